"""The three losses of AlignX as pure functions: arrays in, sums out. They know no model and no device.

Pairs come in G groups of n slots, `[G,n,...]`, one group a device, so that a sharded group axis keeps pooling and
rows local. `Scope` says whom a pair meets: all groups, or its own group only. Every function returns a SUM over
pairs or tokens; who calls divides once, by the weight of the whole step.
"""
