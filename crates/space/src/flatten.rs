//! From the tree of regions to disjoint ranges.

use crate::tree::Node;
use std::sync::Arc;

/// A range that one region claims.
#[derive(Clone)]
pub(crate) struct Claim {
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) node: Arc<Node>,
    /// The offset in the node's region of `start`.
    pub(crate) offset: u64,
    /// Read-only by itself or through anything above.
    pub(crate) readonly: bool,
}

/// The ranges that the tree claims between 0 and `end` (exclusive), sorted, disjoint, neighbours joined.
///
/// Regions are visited in the order of visibility: a region's children, highest priority first, then the region itself. Each takes
/// what nobody has taken before it. A container takes nothing, so what its children leave is left to its siblings: priorities are never
/// compared across containers.
pub(crate) fn flatten(root: &Arc<Node>, end: u128) -> Vec<Claim> {
    let mut claims = Vec::new();
    visit(root, Window { base: 0, low: 0, high: end.min(1 << 64) as i128 }, false, &mut claims);
    join(claims)
}

/// The ranges that one child alone claims of a parent with `size` bytes, in offsets of the parent.
pub(crate) fn flatten_child(child: &Arc<Node>, size: u128) -> Vec<Claim> {
    let mut claims = Vec::new();
    let window = Window { base: child.offset.into(), low: 0, high: size.min(1 << 64) as i128 };
    visit(child, window, false, &mut claims);
    claims
}

/// Where a region is seen: its first byte is at `base`, and only `low..high` shows. All in addresses of the space; `base` can be
/// negative (an alias that starts in the middle of its target) or beyond the end.
#[derive(Clone, Copy)]
struct Window {
    base: i128,
    low: i128,
    high: i128,
}

fn visit(node: &Arc<Node>, window: Window, readonly: bool, claims: &mut Vec<Claim>) {
    let Window { base, low, high } = window;
    let (low, high) = (low.max(base), high.min(base + node.size as i128));
    if !node.enabled || low >= high {
        return;
    }
    let readonly = readonly || node.readonly;
    if let Some((target, offset)) = &node.target {
        visit(target, Window { base: base - i128::from(*offset), low, high }, readonly, claims);
        return;
    }
    for child in &node.children {
        visit(child, Window { base: base + i128::from(child.offset), low, high }, readonly, claims);
    }
    if node.claims() {
        claim_gaps(node, Window { base, low, high }, readonly, claims);
    }
}

/// Claims for `node` what is still free of `low..high`.
fn claim_gaps(node: &Arc<Node>, window: Window, readonly: bool, claims: &mut Vec<Claim>) {
    let Window { base, low, high } = window;
    let first = claims.partition_point(|claim| i128::from(claim.last) < low);
    let after = claims.partition_point(|claim| i128::from(claim.start) < high);
    let mut merged = Vec::with_capacity(2 * (after - first) + 1);
    let mut free = low;
    let gap = |from: i128, to: i128| Claim {
        start: from as u64,
        last: (to - 1) as u64,
        node: node.clone(),
        offset: (from - base) as u64,
        readonly,
    };
    for claim in &claims[first..after] {
        let start = i128::from(claim.start);
        if free < start {
            merged.push(gap(free, start));
        }
        free = i128::from(claim.last) + 1;
        merged.push(claim.clone());
    }
    if free < high {
        merged.push(gap(free, high));
    }
    claims.splice(first..after, merged);
}

/// Joins neighbours that are one piece of the same region.
fn join(claims: Vec<Claim>) -> Vec<Claim> {
    let mut joined: Vec<Claim> = Vec::with_capacity(claims.len());
    for claim in claims {
        match joined.last_mut() {
            Some(last)
                if last.last.checked_add(1) == Some(claim.start)
                    && Arc::ptr_eq(&last.node, &claim.node)
                    && last.offset.wrapping_add(claim.start - last.start) == claim.offset
                    && last.readonly == claim.readonly =>
            {
                last.last = claim.last;
            }
            _ => joined.push(claim),
        }
    }
    joined
}
