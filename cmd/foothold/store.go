package main

import (
	"foothold/dmz/store"

	"github.com/spf13/cobra"
)

func storeCommand() *cobra.Command {
	return daemonCommand("store", "Keep workloads and boot components by their SHA-256", store.Run)
}
