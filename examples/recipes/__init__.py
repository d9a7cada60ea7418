"""Services that use ctxalchemy together with other libraries.  Each file is complete."""
