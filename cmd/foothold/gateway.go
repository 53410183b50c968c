package main

import (
	"foothold/dmz/gateway"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func gatewayCommand() *cobra.Command {
	return daemonCommand("gateway", "Admit VMs to the tunnel and relay what they say through it", gateway.Run, unix.CAP_NET_ADMIN)
}
