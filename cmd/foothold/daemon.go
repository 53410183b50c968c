package main

import (
	"context"
	"log/slog"
	"os"

	"foothold/internal/config"
	"foothold/internal/harden"
	"foothold/internal/harden/fence"

	"github.com/spf13/cobra"
)

// daemonConfig is a daemon's configuration, which says all that the daemon opens.
type daemonConfig interface{ Files() fence.Files }

// daemonCommand makes `foothold NAME --config FILE`: a process without privileges but
// the kept capabilities, that starts no program and opens the files of its configuration alone. C's zero value
// holds no defaults: run fills them in and validates before it starts anything.
func daemonCommand[C daemonConfig](name, short string, run func(context.Context, C) error, keep ...uintptr) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   name + " --config FILE",
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := harden.Process(keep...); err != nil {
				return err
			}
			if err := harden.NoPrograms(); err != nil {
				return err
			}
			slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("daemon", name))
			harden.LogCalls()
			var c C
			if err := config.Read(file, &c); err != nil {
				return &exitError{exitUsage, err}
			}
			if err := enclose(c.Files()); err != nil {
				return err
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

// enclose bounds the daemon's files and says how well the kernel does so.
func enclose(files fence.Files) error {
	version, err := files.Enclose()
	switch {
	case err != nil:
		return err
	case version == 0:
		slog.Warn("files not bounded: this kernel has no Landlock")
	default:
		slog.Info("files bounded", "landlock", version)
	}
	return nil
}
