"""A small shop: a FastAPI service that uses two databases."""
