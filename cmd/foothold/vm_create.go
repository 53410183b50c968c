package main

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"foothold/client"
	"foothold/protocol/api"
	"foothold/protocol/event"

	"github.com/spf13/cobra"
)

// createFlags are the flags of `vm create`.
type createFlags struct {
	template, size string
	restart        string
	workload       workloadFlags
	wait           bool
	timeout        time.Duration
}

func vmCreate() *cobra.Command {
	var f createFlags
	c := jsonFlag(&cobra.Command{
		Use:   "create NAME",
		Short: "Reserve a VM and take it through the boot story",
		Long: `Reserve a VM and take it through the boot story. Without --wait the command returns as
soon as the reservation stands.

A workload is an executable (a static program or a script) or a tarball with an entry
point. It is uploaded to your store, pinned by its digest, and fetched by the VM through
its tunnel once the VM computes; it runs as an unprivileged user.`,
		Example: `  foothold vm create web --wait
  foothold vm create web --workload ./server --workload-port 8080 --wait
  foothold vm create app --workload app.tar.gz --entry bin/start --size medium --wait
  foothold vm create web --wait --json | jq '.phases[] | {name, seconds}'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return create(cmd, args[0], f) },
	})
	c.Flags().StringVarP(&f.template, "template", "t", "", "template `NAME` (default: the newest)")
	c.Flags().StringVarP(&f.size, "size", "s", "", "`SIZE` of the VM: small, medium or large (default small)")
	c.Flags().StringVarP(&f.workload.file, "workload", "w", "", "executable or tarball `FILE` to run")
	c.Flags().StringVar(&f.workload.entry, "entry", "", "`PATH` of the executable inside a tarball")
	c.Flags().IntVar(&f.workload.port, "workload-port", defaultPort, "TCP `PORT` that answers when the workload is ready")
	c.Flags().StringVar(&f.restart, "restart", "", "`POLICY` for a VM that ends unasked: always, on-failure or never (default on-failure)")
	c.Flags().BoolVar(&f.wait, "wait", false, "wait until the VM is ready, showing each phase")
	c.Flags().DurationVar(&f.timeout, "timeout", 0, "stop waiting after this `TIME`; the VM goes on (default: wait for the phases' own deadlines)")
	return c
}

func create(cmd *cobra.Command, name string, f createFlags) error {
	s, err := open(cmd)
	if err != nil {
		return failed(cmd, api.VM{Name: name}, err)
	}
	ctx, stop := limited(cmd, f.timeout)
	defer stop()
	req := api.CreateVM{Name: name, Template: f.template, Size: f.size, Restart: f.restart}
	if f.workload.file == "" && (f.workload.entry != "" || cmd.Flags().Changed("workload-port")) {
		return failed(cmd, api.VM{Name: name}, usage("--entry and --workload-port belong to a --workload"))
	}
	if f.workload.file != "" {
		if req.Workload, err = s.putWorkload(ctx, f.workload); err != nil {
			return failed(cmd, api.VM{Name: name}, err)
		}
	}
	vm, err := s.CreateVM(ctx, req)
	if err != nil {
		return failed(cmd, api.VM{Name: name}, err)
	}
	if f.wait {
		if vm, err = s.follow(ctx, vm.ID); err != nil {
			return failed(cmd, vm, err)
		}
	}
	switch {
	case wantsJSON(cmd):
		return printJSON(cmd.OutOrStdout(), complete(vm))
	case f.wait:
		s.log.Line("%s", readyText(vm))
	default:
		s.log.Line("VM %s is reserved as %s; follow it: foothold vm watch %s", vm.Name, vm.ID, vm.Name)
	}
	return nil
}

// follow shows a VM's phases until it is ready or ended.
func (s *session) follow(ctx context.Context, name string) (api.VM, error) {
	return s.followStart(ctx, name, 0)
}

// followStart is follow for a start of that number or a later one.
func (s *session) followStart(ctx context.Context, name string, start int) (api.VM, error) {
	d := newPhaseSteps(s.log)
	defer d.steps.Close()
	a := newAwaited(s, d.steps)
	return s.WaitStart(ctx, name, start, func(vm api.VM) {
		a.see(ctx, vm)
		if vm.Start >= start {
			d.see(vm)
		}
	})
}

// failed prints, with --json, the object that scripts expect also of a failure, with a
// stable reason; err still decides the exit code.
func failed(cmd *cobra.Command, vm api.VM, err error) error {
	if !wantsJSON(cmd) {
		return err
	}
	var refusal *client.Refusal
	switch {
	case errors.As(err, &refusal):
		vm.Phase, vm.Reason, vm.Explanation = "refused", refusal.Reason, refusal.Detail
	case vm.Reason == "":
		vm.Reason, vm.Explanation = ownReason(err), err.Error()
	}
	if err := printJSON(cmd.OutOrStdout(), complete(vm)); err != nil {
		return err
	}
	return err
}

// ownReason is the reason for a failure that the orchestrator has not named.
func ownReason(err error) event.Reason {
	switch exitCode(err) {
	case exitUsage:
		return event.BadRequest
	case exitTimeout:
		return event.WaitTimeout
	case exitInterrupted:
		return event.Interrupted
	case exitUnreachable:
		if errors.Is(err, client.ErrUntrusted) {
			return event.OrchestratorUntrusted
		}
		return event.OrchestratorAway
	}
	return event.InternalError
}

// watchJSON prints every change of a VM as one line.
func watchJSON(cmd *cobra.Command, s *session, name string) error {
	last := ""
	var broken error
	_, err := s.Wait(cmd.Context(), name, func(vm api.VM) {
		state, err := json.Marshal(complete(vm))
		if err != nil {
			broken = err
			return
		}
		if key := vm.Phase + readyMark(vm); key != last {
			last = key
			cmd.OutOrStdout().Write(append(state, '\n'))
		}
	})
	return errors.Join(broken, err)
}

func readyMark(vm api.VM) string {
	if vm.Ready {
		return "+"
	}
	return ""
}
