// Foothold-guest is the first process of the delivered initramfs, and later, from
// memory, the agent beside the decrypted OS. It knows no option and no argument.
package main

import (
	"context"
	"fmt"
	"os"

	"foothold/guest/agent"
	"foothold/guest/pid1"
	"foothold/guest/resident"
)

func main() {
	switch {
	case os.Getpid() == 1:
		a := &agent.Agent{Console: pid1.Console{Name: "foothold-guest"}}
		a.Fail(a.Run(context.Background()), pid1.PowerOff)
		select {} // a first process that ends is a kernel panic, which would restart the VM
	case os.Args[0] == resident.Name:
		err := resident.Main(context.Background())
		pid1.Console{Name: resident.Name}.Say("FAILED %v", err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "foothold-guest: runs only in a VM")
	os.Exit(2)
}
