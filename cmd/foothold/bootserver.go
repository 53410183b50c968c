package main

import (
	"foothold/dmz/bootserver"

	"github.com/spf13/cobra"
)

func bootserverCommand() *cobra.Command {
	return daemonCommand("bootserver", "Carry the boot conversation between VMs and the orchestrator", bootserver.Run)
}
