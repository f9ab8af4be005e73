"""The stages base and import: the model that everything starts from, and models from elsewhere."""
