package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"foothold/client"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/lab/supervisor"
)

func labCommand() *cobra.Command {
	var dir string
	cmd := group("lab", "Run the whole system on this machine, in namespaces",
		`Run the whole system on this machine, in namespaces: the tenant's data centre, the
DMZ with its firewalls, and a provider's hypervisor with a TPM, each daemon a process
in a network of its own. It needs no root and leaves nothing behind.`)
	cmd.Example = `  foothold lab up
  foothold lab exec tenant -- ip route
  foothold lab down`
	cmd.PersistentFlags().StringVar(&dir, "state", "", `the lab's `+"`DIR`"+` (default: that of the current context, if a lab made it; for up and else
~/.local/state/foothold/lab, or below $XDG_STATE_HOME)`)
	in := func(unnamed func() (string, error), open func(string) (lab.State, error)) openLab {
		return func() (lab.State, error) {
			if dir == "" {
				var err error
				if dir, err = unnamed(); err != nil {
					return lab.State{}, err
				}
			}
			return open(dir)
		}
	}
	fresh, state := in(defaultLab, lab.Open), in(currentLab, lab.Existing)
	cmd.AddCommand(labUp(fresh), labDown(state), labStatus(state), labLogs(state), labExec(state), labFetch(state), labRestart(state), labFirst(state), labAudit(state), labPreflight())
	cmd.AddCommand(labInner()...)
	return cmd
}

// openLab finds the lab that a command is about; only `up` makes one.
type openLab func() (lab.State, error)

// currentLab is the lab that made the current context, so that after `lab up` commands
// need no --state; without one it is the default.
func currentLab() (string, error) {
	if c, err := client.Find(""); err == nil {
		dir := filepath.Dir(c.File)
		if (lab.State{Dir: dir}).Context() == c.File {
			if info, err := os.Stat((lab.State{Dir: dir}).Run()); err == nil && info.IsDir() {
				return dir, nil
			}
		}
	}
	return defaultLab()
}

func defaultLab() (string, error) {
	if base := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(base) {
		return filepath.Join(base, "foothold", "lab"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find home directory (give --state DIR): %w", err)
	}
	return filepath.Join(home, ".local", "state", "foothold", "lab"), nil
}

func labUp(open openLab) *cobra.Command {
	var wish supervisor.Wish
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the lab, making its keys and configurations the first time",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			if err := checkPreflight(cmd.ErrOrStderr()); err != nil {
				return err
			}
			began := time.Now()
			out := cmd.ErrOrStderr()
			err = supervisor.Start(cmd.Context(), state, wish, func(s supervisor.Step) {
				fmt.Fprintf(out, "  %-46s %6.1f s\n", s.Text, s.Seconds)
			})
			if errors.Is(err, supervisor.ErrUp) {
				fmt.Fprintf(out, "the lab in %s is up already\n", state.Dir)
				err = nil
			} else if err == nil {
				fmt.Fprintf(out, "the lab is up after %.1f s; `foothold lab status --state %s` shows it\n", time.Since(began).Seconds(), state.Dir)
			}
			if err != nil {
				return fmt.Errorf("lab up: %w", err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), state.Context())
			return err
		},
	}
	cmd.Flags().BoolVar(&wish.KeepGoing, "keep-going", false, "come up without daemons that do not start")
	cmd.Flags().IntVar(&wish.Patience, "patience", 1, "multiply every phase's time limit by `N`, for a slow or busy machine")
	return cmd
}

func labDown(open openLab) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "End the lab; its keys, VMs' volumes and logs stay in the state directory",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := open()
			if errors.Is(err, lab.ErrNone) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := supervisor.Down(cmd.Context(), state); err != nil {
				return err
			}
			return client.Forget(state.Context())
		},
	}
}

func labStatus(open openLab) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what runs in the lab",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			reply, err := control.Call(cmd.Context(), state.Run(), control.Request{Op: control.OpStatus})
			if errors.Is(err, control.ErrDown) {
				return fmt.Errorf("%w: `foothold lab up --state %s` starts it", err, state.Dir)
			}
			if err != nil {
				return err
			}
			reply.Status.PID, _ = supervisor.Running(state)
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(reply.Status)
			}
			return printStatus(cmd.OutOrStdout(), reply.Status)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

func printStatus(w io.Writer, st *control.Status) error {
	fmt.Fprintf(w, "lab      %s\nup for   %s (process %d)\nAPI      https://%s\ncontext  %s\nVMs run  with %s\n\n",
		st.State, time.Since(st.Since).Round(time.Second), st.PID, st.API, st.Context, st.Accel)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "DAEMON\tPLACE\tSTATE\tFOR\tRESTARTS\tLAST EXIT")
	for _, d := range st.Daemons {
		since := "-"
		if !d.Since.IsZero() {
			since = time.Since(d.Since).Round(time.Second).String()
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\n", d.Name, d.Place, d.State, since, d.Restarts, d.LastExit)
	}
	fmt.Fprintln(table, "\nPLACE\tADDRESSES\tWHAT IT IS")
	for _, p := range lab.Places() {
		var addresses []string
		for _, port := range p.Ports {
			addresses = append(addresses, port.Address.Addr().String())
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", p.Name, strings.Join(addresses, " "), p.About)
	}
	return table.Flush()
}

func labRestart(open openLab) *cobra.Command {
	var sig int
	cmd := &cobra.Command{
		Use:   "restart DAEMON",
		Short: "Kill a daemon; the lab starts it again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			_, err = control.Call(cmd.Context(), state.Run(), control.Request{Op: control.OpKill, Name: args[0], Signal: sig})
			return err
		},
	}
	cmd.Flags().IntVar(&sig, "signal", int(syscall.SIGTERM), "the signal's number")
	return cmd
}

func labLogs(open openLab) *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:   "logs [DAEMON...]",
		Short: "Show the daemons' logs",
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			var files []string
			for _, name := range args {
				if strings.ContainsAny(name, "/.") {
					return &exitError{exitUsage, fmt.Errorf("%q is no daemon's name", name)}
				}
				files = append(files, state.Log(name))
			}
			if len(files) == 0 {
				if files, err = filepath.Glob(state.Log("*")); err != nil {
					return fmt.Errorf("find logs: %w", err)
				}
			}
			if len(files) == 0 {
				return errors.New("there are no logs yet")
			}
			argv := []string{fmt.Sprintf("--lines=%d", lines)}
			if follow {
				argv = append(argv, "--follow=name", "--retry")
			}
			tail := exec.CommandContext(cmd.Context(), "tail", append(argv, files...)...)
			tail.Stdout, tail.Stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
			if err := tail.Run(); err != nil && cmd.Context().Err() == nil {
				return fmt.Errorf("show logs: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as the logs grow")
	cmd.Flags().IntVarP(&lines, "lines", "n", 50, "lines of each log")
	return cmd
}
