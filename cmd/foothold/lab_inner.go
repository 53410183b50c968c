package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"foothold/internal/harden"
	"foothold/lab"
	"foothold/lab/supervisor"
)

// labInner are the commands that the lab runs inside itself.
func labInner() []*cobra.Command {
	hidden := func(use string, args cobra.PositionalArgs, run func(ctx context.Context, w io.Writer, args []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Hidden: true, Args: args, DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, args []string) error {
				return run(cmd.Context(), cmd.OutOrStdout(), args)
			}}
	}
	return []*cobra.Command{
		hidden("init", cobra.ExactArgs(1), func(_ context.Context, _ io.Writer, args []string) error { return supervisor.Init(args) }),
		hidden("supervise", cobra.ExactArgs(1), func(_ context.Context, _ io.Writer, args []string) error {
			return supervisor.Run(args[0])
		}),
		hidden("confine", cobra.ExactArgs(1), func(_ context.Context, _ io.Writer, args []string) error { return supervisor.Confine(args[0]) }),
		hidden("page", cobra.NoArgs, func(ctx context.Context, _ io.Writer, _ []string) error {
			if err := harden.Process(); err != nil {
				return err
			}
			return lab.ServePage(ctx)
		}),
		hidden("get", cobra.ExactArgs(1), func(ctx context.Context, w io.Writer, args []string) error { return getPage(ctx, w, args[0]) }),
	}
}
