//! The profile as one HTML page that needs nothing else: no network, no files beside it.

use super::{Bins, Histogram, Summary};
use hyaline_space::Actor;
use serde_json::{Value, json};

/// Accesses in the page: the last, and the slowest.
const ACCESSES: usize = 4000;

fn bins(b: &Bins) -> Value {
    json!({"w": b.width, "c": b.columns})
}

impl Summary {
    /// The page.
    pub fn html(&self) -> String {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .filter(|r| !r.nested())
            .map(|r| {
                let s = &r.stat;
                let used = |f: fn(&u32) -> bool| s.histogram.0.iter().position(f);
                let first = used(|n| *n > 0).unwrap_or(0);
                let last = s.histogram.0.iter().rposition(|n| *n > 0).map_or(0, |l| l + 1);
                let hist: Vec<_> = (first..last)
                    .filter_map(|c| Some((Histogram::floor(c), *s.histogram.0.get(c)?)))
                    .collect();
                json!({
                    "name": r.name(), "dir": if s.is_write { "write" } else { "read" }, "access": r.access(),
                    "region": s.site.label(), "count": s.count, "took": s.took, "p50": s.histogram.quantile(0.5),
                    "p99": s.histogram.quantile(0.99), "max": s.max, "by": r.functions.first().map_or("-", |f| f.0.as_str()),
                    "hist": hist, "bins": bins(&s.bins), "cells": r.cells,
                })
            })
            .collect();
        // The slowest are among the kept ones wherever they lie in time; of the others the last.
        let mut by_time: Vec<usize> = (0..self.accesses.len()).collect();
        by_time.sort_by_key(|i| std::cmp::Reverse(self.accesses.get(*i).map_or(0, |k| k.record.took)));
        let last = self.accesses.len().saturating_sub(ACCESSES);
        let mut chosen: Vec<usize> = by_time.into_iter().take(200).chain(last..self.accesses.len()).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let accesses: Vec<Value> = chosen
            .into_iter()
            .filter_map(|i| self.accesses.get(i))
            .map(|k| {
                let (r, s) = (&k.record, &k.site);
                let who = match r.actor {
                    Actor::Vcpu(n) => n.to_string(),
                    other => other.to_string(),
                };
                let place = format!("{}:{:#x}/{}", s.space_label(), r.addr, crate::filter::length(r));
                let rip = k.guest.clone().unwrap_or_else(|| format!("{:#x}", r.rip));
                let register = format!("{}+{:x} {}", s.label(), r.offset, s.register_name());
                let what = r.findings(s).join("; ");
                json!([r.time, who, r.exit.as_str(), place, register, r.value_text(s), what, r.took, rip])
            })
            .collect();
        let span = self.vcpus.iter().map(|b| b.width * b.columns.len() as u64).max().unwrap_or(1).max(1);
        let data = json!({
            "seconds": self.seconds, "count": self.count(), "took": self.took(), "symbols": self.symbols,
            "shares": self.shares().map(|(guest, handlers, waits)| json!({"guest": guest, "handlers": handlers, "waits": waits})),
            "shares_text": self.shares_text(), "stacks_text": self.stacks_text(), "guest": self.guest_flame().json("all time outside of handlers"),
            "hottest": self.hottest().into_iter().take(200).collect::<Vec<_>>(), "looks": self.moments.runs,
            "findings": self.findings(), "flame": self.flame().json("all exits"), "rows": rows,
            "vcpus": self.vcpus.iter().map(bins).collect::<Vec<_>>(), "span": span, "bins": super::BINS, "accesses": accesses,
        });
        // Inside of a script element only `<` could end it early.
        let data = data.to_string().replace('<', "\\u003c");
        include_str!("page.html").replacen("/*DATA*/", &data, 1)
    }
}
