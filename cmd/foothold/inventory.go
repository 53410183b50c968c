package main

import "github.com/spf13/cobra"

func inventoryCommand() *cobra.Command {
	return group("inventory", "Look after the provider's inventory of hosts and their TPM keys",
		`The inventory is the provider's signed list of hosts, each with the keys that lie in its
TPM. Your side believes none of it unchecked.`, inventoryAudit())
}
