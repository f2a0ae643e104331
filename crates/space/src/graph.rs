//! The one lock of the graph, and transactions.
//!
//! Changes to regions, whichever machine they belong to, are made one thread at a time. The lock belongs to the thread, not to
//! a scope: who holds it may start further transactions, which then publish nothing by themselves.

use crate::space::SpaceInner;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

static GRAPH: Mutex<()> = Mutex::new(());

/// What a thread holds while it is inside of a transaction.
struct Held {
    lock: Option<MutexGuard<'static, ()>>,
    depth: u32,
    pending: Vec<Arc<SpaceInner>>,
}

thread_local! {
    static HELD: RefCell<Held> = const { RefCell::new(Held { lock: None, depth: 0, pending: Vec::new() }) };
}

/// How often listeners may change the graph in answer to a change before they are no longer told within the same transaction.
const MAX_ROUNDS: u32 = 64;

/// A change of several regions that takes effect at once. Made by [`transaction`]; ends when it is dropped. It belongs to the
/// thread that made it.
#[must_use = "a transaction ends when it is dropped"]
pub struct Transaction {
    /// Not Send: the lock belongs to this thread.
    _thread: PhantomData<*const ()>,
}

/// Starts a transaction. Until it is dropped, other threads wait before they change any region; the guests run on with the old
/// views. Transactions nest within a thread: the outermost one publishes. A single change outside of any transaction is one itself.
///
/// Listeners are called at the end of the outermost transaction, in the thread that drops it; they may change the graph again.
pub fn transaction() -> Transaction {
    let have = HELD.with_borrow_mut(|held| {
        if held.depth > 0 {
            held.depth += 1;
        }
        held.depth > 0
    });
    if !have {
        // Not inside of `with`: this may block. A thread that panicked has still published its views, so poison says nothing.
        let lock = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);
        HELD.with_borrow_mut(|held| {
            held.lock = Some(lock);
            held.depth = 1;
        });
    }
    Transaction { _thread: PhantomData }
}

/// Notes that the space needs a new view. Only inside of a transaction.
pub(crate) fn mark(space: Arc<SpaceInner>) {
    HELD.with_borrow_mut(|held| {
        if !held.pending.iter().any(|p| Arc::ptr_eq(p, &space)) {
            held.pending.push(space);
        }
    });
}

/// Leaves the graph's lock even when a listener panics.
struct Leave;

impl Drop for Leave {
    fn drop(&mut self) {
        // The lock is dropped after the borrow has ended.
        let _lock = HELD.with_borrow_mut(|held| {
            held.depth -= 1;
            if held.depth == 0 { held.lock.take() } else { None }
        });
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        let _leave = Leave;
        if HELD.with_borrow(|held| held.depth) != 1 {
            return;
        }
        let mut rounds = 0;
        loop {
            let pending = HELD.with_borrow_mut(|held| std::mem::take(&mut held.pending));
            if pending.is_empty() {
                return;
            }
            // Once listeners have been told too often, views are still published and the difference is told next time.
            rounds += 1;
            for space in pending {
                space.publish(rounds <= MAX_ROUNDS);
            }
        }
    }
}
