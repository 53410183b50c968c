package main

import (
	"foothold/dmz/firewall"

	"github.com/spf13/cobra"
)

func firewallCommand() *cobra.Command {
	return daemonCommand("firewall", "Make the kernel's rules what the orchestrator's zone documents say", firewall.Run)
}
