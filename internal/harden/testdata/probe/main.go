// Command probe hardens itself, unless told to stay "plain", keeping CAP_NET_ADMIN,
// says so, and waits until its standard input ends.
package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"foothold/internal/harden"
)

func main() {
	if len(os.Args) == 1 {
		if err := harden.Process(unix.CAP_NET_ADMIN); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}
