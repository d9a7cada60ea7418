"""One session and the connections below it: everything that depends on how SQLAlchemy and the drivers work inside.

``session`` commits, rolls back and closes one session.  ``guard`` tracks the state of each connection.  ``in_use``
names the tasks that are using a session.  ``drivers`` contains what differs between drivers, and ``internals`` contains
every name that SQLAlchemy does not promise to keep.
"""
