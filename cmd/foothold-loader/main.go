// Foothold-loader is the first process of a VM's firmware stage. It is measured and
// runs before anything of the tenant's does: it knows no option and no argument.
package main

import (
	"context"
	"fmt"
	"os"

	"foothold/guest/hostport"
	"foothold/guest/loader"
	"foothold/guest/pid1"
	"foothold/internal/kmod"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "foothold-loader: runs only as the first process of a VM")
		os.Exit(2)
	}
	console := pid1.Console{Name: "foothold-loader"}
	err := run(console)
	console.Say("FAILED %v", err)
	if err := pid1.PowerOff(); err != nil {
		console.Say("cannot power off: %v", err)
	}
	select {} // a first process that ends is a kernel panic, which would restart the VM
}

// run returns only on failure.
func run(console pid1.Console) error {
	if err := pid1.Mount(); err != nil {
		return err
	}
	console.Say("started")
	modules, err := kmod.Open()
	if err != nil {
		return err
	}
	if err := modules.LoadAll(); err != nil {
		return err
	}
	channel, err := hostport.Open()
	if err != nil {
		return err
	}
	spec, t1, err := loader.ReadPlatform()
	if err != nil {
		return loader.Refuse(channel, err)
	}
	if err := pid1.Network(spec.Network.MAC, spec.Network.Address, spec.Network.Gateway, spec.Network.MTU); err != nil {
		return loader.Refuse(channel, err)
	}
	console.Say("reservation %s start %d", spec.Reservation, spec.Start)
	err = loader.Boot(context.Background(), loader.Machine{Spec: spec, Token: t1, Channel: channel, Kexec: loader.Kexec, Say: console.Say})
	if err != nil {
		return err
	}
	channel.Close()
	return fmt.Errorf("start the delivered kernel: %w", loader.Jump())
}
