package main

import (
	"encoding/json"
	"log/slog"
	"os"

	"foothold/tenant/orchestrator"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func orchestratorCommand() *cobra.Command {
	return group("orchestrator", "The tenant's deciding daemon",
		`The orchestrator holds reservations, keys and decisions. It runs in the tenant's data
centre. init makes its state once; run serves operators and the DMZ's daemons.`,
		orchestratorInit(), orchestratorRun())
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
			unix.Umask(privateUmask)
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
			if err := shieldProcess(); err != nil {
				return err
			}
			slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("daemon", "orchestrator"))
			return orchestrator.Main(cmd.Context(), file)
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	c.MarkFlagRequired("config")
	return c
}
