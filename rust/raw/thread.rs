//! Which thread this is.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A number that no other thread has, from 1 on, in the order in which threads ask.
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
