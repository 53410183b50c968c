package main

import (
	"github.com/spf13/cobra"
)

func vmWorkload() *cobra.Command {
	var f workloadFlags
	wait := false
	c := jsonFlag(&cobra.Command{
		Use: "workload NAME --workload FILE", Short: "Give a VM another workload",
		Long: `Give a VM another workload without starting it anew: it is uploaded to your store, the VM
is told with the answer to its next heartbeat, ends the old one and fetches the new one
through its tunnel. The VM is ready again when the new one answers. If it fails, the VM
goes on computing without a workload. A VM that does not compute gets it with its next start.`,
		Example: `  foothold vm workload web --workload ./server2 --wait
  foothold vm workload app --workload app.tar.gz --entry bin/start`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			if f.file == "" {
				return usage("--workload FILE is missing")
			}
			w, err := s.putWorkload(cmd.Context(), f)
			if err != nil {
				return err
			}
			vm, err := s.SetWorkload(cmd.Context(), args[0], *w)
			if err == nil && wait {
				vm, err = s.follow(cmd.Context(), vm.ID)
			}
			if err != nil {
				return failed(cmd, vm, err)
			}
			switch {
			case wantsJSON(cmd):
				return printJSON(cmd.OutOrStdout(), complete(vm))
			case wait:
				s.log.Line("VM %s is ready with its new workload; it answers at %s from the tenant's network", vm.Name, vm.WorkloadURL)
			default:
				s.log.Line("VM %s was given its new workload; follow it: foothold vm watch %s", vm.Name, vm.Name)
			}
			return nil
		}),
	})
	c.Flags().StringVarP(&f.file, "workload", "w", "", "executable or tarball `FILE` to run")
	c.Flags().StringVar(&f.entry, "entry", "", "`PATH` of the executable inside a tarball")
	c.Flags().IntVar(&f.port, "workload-port", defaultPort, "TCP `PORT` that answers when the workload is ready")
	c.Flags().BoolVar(&wait, "wait", false, "wait until the new workload answers")
	return c
}
