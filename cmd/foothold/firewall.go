package main

import (
	"foothold/dmz/firewall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func firewallCommand() *cobra.Command {
	return daemonCommand("firewall", "Make the kernel's rules what the orchestrator's zone documents say", firewall.Run, unix.CAP_NET_ADMIN)
}
