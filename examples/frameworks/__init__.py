"""One small service in several frameworks, and without one.  Run them in the folder above this one."""
