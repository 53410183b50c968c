// Command probe hardens itself, unless told to stay "plain", keeping CAP_NET_ADMIN; told
// to stay "alone", it starts no program. It says "ready" and waits until its standard input
// ends, or it is told more: "try NUMBER ARGUMENT" makes that system call with that first
// argument and zeros, and prints its error; "try32" makes one by the numbers of 32-bit
// programs; "run PROGRAM ARGUMENT..." starts a program and prints what it says.
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/sys/unix"

	"foothold/internal/harden"
)

func main() {
	args := os.Args[1:]
	how := ""
	if len(args) > 0 {
		how, args = args[0], args[1:]
	}
	if how != "plain" {
		fail(harden.Process(unix.CAP_NET_ADMIN))
	}
	if how == "alone" {
		fail(harden.NoPrograms())
	}
	switch {
	case len(args) == 0:
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
	case args[0] == "try":
		call, err := strconv.ParseUint(args[1], 0, 32)
		fail(err)
		argument, err := strconv.ParseUint(args[2], 0, 32)
		fail(err)
		_, _, errno := unix.RawSyscall6(uintptr(call), uintptr(argument), 0, 0, 0, 0, 0)
		fmt.Println(unix.ErrnoName(errno))
	case args[0] == "try32":
		fail(call32())
		fmt.Println("called")
	case args[0] == "run":
		out, err := exec.Command(args[1], args[2:]...).CombinedOutput()
		os.Stdout.Write(out)
		fail(err)
	}
}

func fail(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
