package main

import (
	"foothold/dmz/gateway"

	"github.com/spf13/cobra"
)

func gatewayCommand() *cobra.Command {
	return daemonCommand("gateway", "Admit VMs to the tunnel and relay what they say through it", gateway.Run)
}
