"""A web page that asks a model about a radiograph."""
