//! Siblings of equal priority that claim the same addresses: allowed, but hardly ever meant.

use crate::flatten::flatten_child;
use crate::tree::Node;
use crate::{AddrRange, AddressSpace, Region, transaction};
use serde::Serialize;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

/// Two children of one region with equal priority that both answer in a range. The one added last is seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// The path of the region that holds both.
    pub parent: String,
    /// The range, in offsets of the parent.
    pub range: AddrRange,
    /// The priority of both.
    pub priority: i32,
    /// The path of the one that is seen.
    pub a: String,
    /// The owner of the one that is seen; may be empty.
    pub a_owner: String,
    /// The path of the one that is hidden.
    pub b: String,
    /// The owner of the one that is hidden; may be empty.
    pub b_owner: String,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = |owner: &str| if owner.is_empty() { String::new() } else { format!(" (of {owner})") };
        write!(
            f,
            "{}{} and {}{} overlap in {} at {} with equal priority {}; the former was added last and is seen. \
             Give them different priorities, or move one.",
            self.a,
            owner(&self.a_owner),
            self.b,
            owner(&self.b_owner),
            self.parent,
            self.range,
            self.priority
        )
    }
}

impl Region {
    /// The overlaps of equal priority in this region and in all that can be seen through it.
    pub fn overlaps(&self) -> Vec<Overlap> {
        let tree = {
            let _transaction = transaction();
            Node::snapshot(self)
        };
        of_tree(&tree)
    }
}

impl AddressSpace {
    /// The overlaps of equal priority in the present view's tree.
    pub fn overlaps(&self) -> Vec<Overlap> {
        of_tree(&self.view().tree)
    }
}

fn of_tree(root: &Arc<Node>) -> Vec<Overlap> {
    let (mut found, mut seen, mut todo) = (Vec::new(), HashSet::new(), vec![root.clone()]);
    while let Some(node) = todo.pop() {
        if !node.enabled || !seen.insert(node.region.id()) {
            continue;
        }
        for (i, a) in node.children.iter().enumerate() {
            for b in node.children.iter().skip(i + 1).take_while(|b| b.priority == a.priority) {
                found.extend(pair(&node, a, b));
            }
        }
        todo.extend(node.target.iter().map(|(target, _)| target).chain(&node.children).cloned());
    }
    found.sort_by(|x, y| (&x.parent, x.range).cmp(&(&y.parent, y.range)));
    found
}

fn pair(parent: &Arc<Node>, a: &Arc<Node>, b: &Arc<Node>) -> Vec<Overlap> {
    let place = |node: &Node| AddrRange::new(node.offset, node.size.min((1 << 64) - u128::from(node.offset)));
    if !place(a).zip(place(b)).is_some_and(|(a, b)| a.overlaps(&b)) {
        return Vec::new();
    }
    let claims_of = |node| flatten_child(node, parent.size);
    let claims_of_b = claims_of(b);
    let mut ranges: Vec<AddrRange> = Vec::new();
    for one in claims_of(a) {
        for other in &claims_of_b {
            let one = AddrRange { start: one.start, last: one.last };
            match (one.intersect(&AddrRange { start: other.start, last: other.last }), ranges.last_mut()) {
                (Some(both), Some(last)) if last.last.checked_add(1) == Some(both.start) => {
                    last.last = both.last
                }
                (Some(both), _) => ranges.push(both),
                (None, _) => {}
            }
        }
    }
    let overlap = |range| Overlap {
        parent: parent.region.path(),
        range,
        priority: a.priority,
        a: a.region.path(),
        a_owner: a.region.owner().to_owned(),
        b: b.region.path(),
        b_owner: b.region.owner().to_owned(),
    };
    ranges.into_iter().map(overlap).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_both_owners_and_only_where_both_answer() {
        let root = Region::container("root", 0x1000);
        let a = Region::container("a", 0x100);
        let b = Region::reservation("b", 0x100).with_owner("device-b");
        root.add(0, &a, 0).expect("fits");
        root.add(0x80, &b, 0).expect("fits");
        assert_eq!(root.overlaps(), [], "the container is a hole");
        let inner = Region::reservation("inner", 0x20);
        a.add(0x70, &inner, 5).expect("fits");
        let space = AddressSpace::new("memory", &root);
        let found = space.overlaps();
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].to_string(),
            "/root/b (of device-b) and /root/a overlap in /root at 0x80..=0x8f with equal priority 0; \
             the former was added last and is seen. Give them different priorities, or move one."
        );
        assert_eq!(space.lookup(0x80).map(|s| s.region), Some(b.clone()));
        b.set_priority(-1);
        assert_eq!(space.overlaps(), []);
        assert_eq!(space.lookup(0x80).map(|s| s.region), Some(inner));
        b.set_priority(0);
        a.set_enabled(false);
        assert_eq!(root.overlaps(), [], "what is switched off overlaps nothing");
    }
}
