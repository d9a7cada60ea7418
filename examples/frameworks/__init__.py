"""A small service in several frameworks, and in plain ASGI: each file is complete.  Also a worker and replicas."""
