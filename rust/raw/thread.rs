//! Numbers for threads.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of the current thread.  No other thread has the same number.  Numbers begin at 1, in the order of first
/// calls.
#[inline(always)]
pub fn number() -> usize {
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(0) };
    }
    static LAST: AtomicUsize = AtomicUsize::new(0);

    NUMBER.with(|number| {
        if number.get() == 0 {
            number.set(LAST.fetch_add(1, Ordering::Relaxed) + 1);
        }
        number.get()
    })
}
