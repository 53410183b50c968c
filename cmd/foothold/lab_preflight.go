package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/spf13/cobra"

	"foothold/lab/preflight"
)

func labPreflight() *cobra.Command {
	var mend bool
	cmd := &cobra.Command{
		Use:   "preflight",
		Short: "Say what this machine lacks, with the line that mends it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if mend && preflight.Able() {
				if err := mendAll(cmd.Context(), cmd.ErrOrStderr()); err != nil {
					return err
				}
			}
			return checkPreflight(cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&mend, "mend", false, "run those lines that need nothing but root")
	return cmd
}

// mendAll runs the lines of what is missing, and shows them.
func mendAll(ctx context.Context, w io.Writer) error {
	for _, f := range preflight.Check() {
		if !f.Root {
			continue
		}
		fmt.Fprintf(w, "missing: %s\n+ %s\n", f.What, f.Mend)
		sh := exec.CommandContext(ctx, "sh", "-c", f.Mend)
		sh.Stdin, sh.Stdout, sh.Stderr = os.Stdin, w, w
		if err := sh.Run(); err != nil {
			return fmt.Errorf("mend %s: %w", f.What, err)
		}
	}
	return nil
}

func checkPreflight(w io.Writer) error {
	findings := preflight.Check()
	for _, f := range findings {
		fmt.Fprintf(w, "missing: %s\n    %s\n", f.What, f.Mend)
	}
	if len(findings) > 0 {
		return &exitError{exitMissing, fmt.Errorf("preflight: %d thing(s) missing; run the lines above", len(findings))}
	}
	return nil
}
