package main

import (
	"path/filepath"

	"foothold/client"
	"foothold/client/term"

	"github.com/spf13/cobra"
)

func contextCommand() *cobra.Command {
	return contextFlag(group("context", "Show or choose the orchestrator that commands talk to",
		`A context is a small file that names an orchestrator and the certificate to show it.
It is found in this order: --context FILE, $`+client.Variable+`, the file that
`+"`foothold lab up` or `foothold context use`"+` remembered.`, contextShow(), contextUse()))
}

func contextShow() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "show", Short: "Show the current context and how it was found",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := findContext(cmd)
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), map[string]string{
					"name": c.Name, "server": c.Server, "file": c.File, "source": c.Source, "certificate": c.Cert})
			}
			term.New(cmd.OutOrStdout()).Fields(
				term.Field{Name: "name", Value: c.Name},
				term.Field{Name: "server", Value: c.Server},
				term.Field{Name: "file", Value: c.File},
				term.Field{Name: "found by", Value: c.Source},
				term.Field{Name: "certificate", Value: c.Cert},
			)
			return nil
		},
	})
}

func contextUse() *cobra.Command {
	return &cobra.Command{
		Use: "use FILE", Short: "Remember a context file for commands that name none",
		Example: "  foothold context use ~/bank/context.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := filepath.Abs(args[0])
			if err != nil {
				return usage("%w", err)
			}
			c, err := client.Find(file)
			if err != nil {
				return usage("%w", err)
			}
			if err := client.Remember(file); err != nil {
				return err
			}
			term.New(cmd.ErrOrStderr()).Line("commands now talk to %s at %s", c.Name, c.Server)
			return nil
		},
	}
}
