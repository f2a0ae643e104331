//! A snapshot of the graph below one root, from which a view is made and which explains it later.

use crate::listener::IoEventFd;
use crate::region::Body;
use crate::{Kind, Region};
use std::collections::HashMap;
use std::sync::Arc;

/// One region as it was when the snapshot was taken.
pub(crate) struct Node {
    pub(crate) region: Region,
    pub(crate) kind: Kind,
    pub(crate) size: u128,
    /// In its parent.
    pub(crate) offset: u64,
    /// Among its parent's children.
    pub(crate) priority: i32,
    pub(crate) enabled: bool,
    pub(crate) readonly: bool,
    pub(crate) romd: bool,
    pub(crate) coalesced: bool,
    pub(crate) log: u8,
    pub(crate) eventfds: Arc<[IoEventFd]>,
    /// In the order of visibility.
    pub(crate) children: Vec<Arc<Node>>,
    /// An alias's target, and the offset in it.
    pub(crate) target: Option<(Arc<Node>, u64)>,
}

impl Node {
    /// Takes the snapshot; the caller is inside of a transaction. `Region::add` bounds the depth.
    pub(crate) fn snapshot(root: &Region) -> Arc<Node> {
        take(root, &mut HashMap::new())
    }

    /// Does the region itself answer (or stay silent on purpose) where it has no child?
    pub(crate) fn claims(&self) -> bool {
        !matches!(self.kind, Kind::Container | Kind::Alias)
    }
}

fn take(region: &Region, known: &mut HashMap<u64, Arc<Node>>) -> Arc<Node> {
    if let Some(node) = known.get(&region.id()) {
        return node.clone();
    }
    let children: Vec<_> = region.children().iter().map(|child| take(child, known)).collect();
    let target = match &region.0.body {
        Body::Alias { target, offset } => Some((take(target, known), *offset)),
        _ => None,
    };
    let state = region.state();
    let node = Arc::new(Node {
        region: region.clone(),
        kind: region.kind(),
        size: state.size,
        offset: state.offset,
        priority: state.priority,
        enabled: state.enabled,
        readonly: state.readonly,
        romd: state.romd,
        coalesced: state.coalesced,
        log: state.log,
        eventfds: state.eventfds.clone(),
        children,
        target,
    });
    drop(state);
    known.insert(region.id(), node.clone());
    node
}
