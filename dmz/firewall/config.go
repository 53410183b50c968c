// Package firewall makes the kernel's rules what the zone document says.
package firewall

import (
	"foothold/dmz/ruleset"
	"foothold/dmz/upstream"
	"foothold/internal/harden/fence"
)

// Config is a firewall daemon's configuration file.
type Config struct {
	// State is a directory for the last zone document.
	State string `yaml:"state"`
	// Zone is external or internal.
	Zone string `yaml:"zone"`
	// Standing flows that must work before the first zone document can arrive: this
	// daemon's and its neighbours' way to the orchestrator.
	Bootstrap []Bootstrap `yaml:"bootstrap"`
	// Adjacent names the interface on which VMs are neighbours on layer 2 (external
	// only): flows there match MAC addresses and neighbour entries are fixed.
	Adjacent string          `yaml:"adjacent"`
	Upstream upstream.Config `yaml:"upstream"`
}

// Bootstrap is one standing flow.
type Bootstrap struct {
	From  string `yaml:"from"` // prefix
	To    string `yaml:"to"`   // prefix
	Proto string `yaml:"proto"`
	Port  int    `yaml:"port"`
}

// Files are all that a firewall opens.
func (c Config) Files() fence.Files {
	return fence.Files{Own: []string{c.State}, Read: c.Upstream.Reads(), Kernel: []string{ruleset.Sysctls}}
}
