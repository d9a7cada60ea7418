"""A small shop: a FastAPI service on two databases."""
