// Command hunter runs inside a lab, as root of its namespaces, and does there what a test
// outside cannot. What it has to know comes on standard input, one JSON object, so that
// no secret is among its arguments; it prints JSON, one object a line.
//
//	search   every file, process and environment named in a Search; prints each hunt.Find
//	collect  secrets where they legitimately are, see Collect; until its input ends
//	capture  what passes the named interfaces, into a folder; until its input ends
//	plant    hold a secret, so that a search must find it; until its input ends
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
)

func main() {
	verbs := map[string]func(*input) error{"search": search, "collect": collect, "capture": capturePackets, "plant": plant}
	if len(os.Args) < 2 || verbs[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: hunter search|collect|capture|plant")
		os.Exit(2)
	}
	if err := verbs[os.Args[1]](&input{json.NewDecoder(os.Stdin)}); err != nil {
		fmt.Fprintln(os.Stderr, "hunter:", err)
		os.Exit(1)
	}
}

// input is standard input: one object, and then nothing until the caller is done.
type input struct{ dec *json.Decoder }

func (i *input) read(v any) error {
	if err := i.dec.Decode(v); err != nil {
		return fmt.Errorf("read standard input: %w", err)
	}
	return nil
}

// untilDone is a context that ends with standard input.
func (i *input) untilDone() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return ctx
}

func say(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
