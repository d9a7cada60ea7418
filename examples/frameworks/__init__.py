"""One small service in several frameworks, and without one."""
