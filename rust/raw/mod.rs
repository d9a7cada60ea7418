//! The lowest layer: the object types for which PyO3's macros are too slow, and all `unsafe` code of the crate.
//!
//! What this module exports is safe to use.  Nothing in this module depends on the layers above it: the behaviour of
//! functions and coroutines comes in through the traits `Body` and `CoroutineBody`.

mod context_var;
mod coroutine;
mod free_list;
mod function;
mod immortal;
mod interpreter;
mod locked;
mod object;
mod outcome;
mod session_store;
mod stop_iteration;
#[cfg(Py_GIL_DISABLED)]
mod thread;
mod types;

pub use context_var::ContextVar;
pub use coroutine::{Attribute, Coroutine, CoroutineBody, Running, SendResult, Started, State};
pub use function::{Body, function};
pub use interpreter::check_interpreter;
pub use outcome::{Argument, Outcome, Raised, catch_panic};
pub use session_store::{Lookup, SessionStore};
