// Command foothold is the operator's tool and the tenant's and DMZ's daemons in one
// binary: `foothold vm`, `foothold lab`, `foothold orchestrator`, and so on.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// commands makes the sub-commands, one file each.
var commands = []func() *cobra.Command{
	vmCommand,
	templateCommand,
	hostCommand,
	inventoryCommand,
	platformCommand,
	eventsCommand,
	statusCommand,
	fsckCommand,
	verifyCommand,
	contextCommand,
	labCommand,
	orchestratorCommand,
	exitCodes,
	versionCommand,
	firewallCommand,
	bootserverCommand,
	gatewayCommand,
	storeCommand,
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		tell(os.Stderr, err)
		os.Exit(exitCode(err))
	}
}

// rootCommand is the whole tree.
func rootCommand() *cobra.Command {
	root := group("foothold", "Run virtual machines on hardware that you do not own, after they proved what they run on", rootHelp)
	root.SilenceUsage, root.SilenceErrors = true, true
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage("%w; see `%s --help`", err, c.CommandPath())
	})
	for _, c := range commands {
		root.AddCommand(c())
	}
	strictArgs(root)
	return root
}

const rootHelp = `Foothold runs virtual machines on hardware that you do not own. Before such a machine
gets any secret, boot component or network of yours, it has proved which software it
runs on, on which inventoried host, and that it is the one you reserved.

Begin on one machine, with everything real but the hardware:

  make lab                          the whole system in namespaces, and a first VM
  foothold vm create web --wait     another one
  foothold vm explain web           where it stands, and what is awaited or went wrong
  foothold events --follow          what everyone does, as it happens`
