"""Stage base_model: the model everything starts from; and stage import."""
