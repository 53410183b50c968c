// Package e2e tests the whole system in the lab: a VM from wish to work and to its
// end, and, from every place in every phase, that only the traffic of that phase's
// line in the table passes.
//
// The tests are behind the build tag "system": they run QEMU and take minutes. They
// use the binaries in bin/ (FOOTHOLD_BIN overrides the folder) and keep what is slow
// to make in build/ (FOOTHOLD_BUILD). Package e2e/probe sends and sees the packets;
// package e2e/hunt looks for secrets where they must not be; package e2e/bench measures.
package e2e
