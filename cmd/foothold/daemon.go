package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"foothold/internal/config"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// privateUmask keeps what a daemon writes its own.
const privateUmask = 0o077

// daemonCommand makes `foothold NAME --config FILE`. C's zero value holds no defaults:
// run fills them in and validates before it starts anything.
func daemonCommand[C any](name, short string, run func(context.Context, C) error) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   name + " --config FILE",
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := shieldProcess(); err != nil {
				return err
			}
			slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("daemon", name))
			var c C
			if err := config.Read(file, &c); err != nil {
				return &exitError{exitUsage, err}
			}
			return run(cmd.Context(), c)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	if err := cmd.MarkFlagRequired("config"); err != nil {
		panic(err) // the flag above exists
	}
	return cmd
}

// shieldProcess keeps other processes of the same user, and core dumps, out of the
// daemon's memory.
func shieldProcess() error {
	unix.Umask(privateUmask)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make process non-dumpable: %w", err)
	}
	return nil
}
