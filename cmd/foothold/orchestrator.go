package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"

	"foothold/internal/harden"
	"foothold/tenant/orchestrator"

	"github.com/spf13/cobra"
)

func orchestratorCommand() *cobra.Command {
	return group("orchestrator", "The tenant's deciding daemon",
		`The orchestrator holds reservations, keys and decisions. It runs in the tenant's data
centre. init makes its state once; run serves operators and the DMZ's daemons; restore takes a
state into use that was put back from a copy.`,
		orchestratorInit(), orchestratorRun(), orchestratorRestore())
}

func orchestratorRestore() *cobra.Command {
	state, yes := "", false
	c := &cobra.Command{
		Use:   "restore --state DIR",
		Short: "Take a state directory into use that was put back from a copy",
		Long: `Take a state directory into use that was put back from a copy: a backup, or a file system
that may have lost commits. What happened after the copy is not in it, so a new epoch
begins: every open token is void, every VM's certificate revoked, every VM that was on its
way aborted; VMs that had computed are stopped, and stay so until you start them: what was
ended for good after the copy is in it as if it ran. The orchestrator that runs next has the hosts destroy what it does not know. Daemons in the DMZ
take the new epoch by themselves. The orchestrator must not run meanwhile.

VMs that were created after the copy are lost with their volumes' keys. Keys that were
destroyed after it are in the copy: delete those VMs again.`,
		Example: "  foothold orchestrator restore --state /var/lib/foothold",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := harden.Process(); err != nil { // it opens the vault
				return err
			}
			if !yes {
				if err := confirm(cmd, fmt.Sprintf("Begin a new epoch in %s? Every VM under way is ended.", state)); err != nil {
					return err
				}
			}
			res, err := orchestrator.Restore(cmd.Context(), state)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(res)
		},
	}
	c.Flags().StringVar(&state, "state", "", "directory of the orchestrator's state")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.MarkFlagRequired("state")
	return c
}

func orchestratorInit() *cobra.Command {
	state := ""
	c := &cobra.Command{
		Use:   "init --state DIR",
		Short: "Make vault, authorities, signing keys and ledger",
		Long: `Make the orchestrator's state: a vault with its key-encryption key, the authorities
boot, dmz, vm, operator and tenant, the manifest and zone keys, and an empty ledger.
What exists is kept. The public parts are printed as one JSON object: the zone key goes
into the DMZ daemons' configurations, the authorities' files to those who check them.`,
		Example: "  foothold orchestrator init --state /var/lib/foothold | jq -r .zone_key",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := harden.Process(); err != nil { // it makes keys
				return err
			}
			res, err := orchestrator.Init(cmd.Context(), state)
			if err != nil {
				return err
			}
			out := json.NewEncoder(cmd.OutOrStdout())
			out.SetIndent("", "  ")
			return out.Encode(res)
		},
	}
	c.Flags().StringVar(&state, "state", "", "directory of the orchestrator's state")
	c.MarkFlagRequired("state")
	return c
}

func orchestratorRun() *cobra.Command {
	file := ""
	c := &cobra.Command{
		Use:     "run --config FILE",
		Short:   "Serve operators and the DMZ's daemons until told to end",
		Example: "  foothold orchestrator run --config /etc/foothold/orchestrator.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := harden.Process(); err != nil {
				return err
			}
			slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("daemon", "orchestrator"))
			harden.LogCalls()
			return orchestrator.Main(cmd.Context(), file, version)
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	c.MarkFlagRequired("config")
	return c
}
