//! Every chip of the machine, one file each.
