//! The commands: answers on stdout, everything else on stderr.
