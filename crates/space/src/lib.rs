//! Regions, flat views, address spaces: the way of one guest access.
