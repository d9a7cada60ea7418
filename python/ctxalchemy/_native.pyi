# What the native module has: the same as its twin, which is written down there.

from ._pure import SessionStore as SessionStore
from ._pure import current as current
from ._pure import db_session as db_session
from ._pure import db_session_nowait as db_session_nowait
from ._pure import enter as enter
from ._pure import init_db_session_ctx as init_db_session_ctx
from ._pure import is_context_initiated as is_context_initiated
from ._pure import leave as leave
