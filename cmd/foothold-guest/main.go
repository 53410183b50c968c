// Foothold-guest is the first process of the delivered initramfs, later a service of
// the decrypted system.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "foothold-guest: runs only as the first process of a VM")
	os.Exit(2)
}
