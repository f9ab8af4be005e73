"""Tables, figures and the report: everything a reader sees, from the files of an experiment."""
