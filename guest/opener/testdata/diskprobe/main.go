// Command diskprobe is the first process of the disks' test: it opens both disks as
// /order.json says, reads the template's file, says how that went on the console, and
// powers off.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"foothold/guest/opener"
	"foothold/guest/pid1"
	"foothold/internal/kmod"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"
)

func main() {
	if err := probe(); err != nil {
		fmt.Printf("PROBE refused %s: %v\n", event.ReasonOf(err), err)
	}
	fmt.Println("PROBE done")
	pid1.PowerOff()
}

func probe() error {
	if err := pid1.Mount(); err != nil {
		return err
	}
	set, err := kmod.Open()
	if err != nil {
		return err
	}
	if err := set.LoadAll(); err != nil {
		return err
	}
	text, err := os.ReadFile("/order.json")
	if err != nil {
		return err
	}
	var order unlockmsg.Handover
	if err := json.Unmarshal(text, &order); err != nil {
		return err
	}
	say := func(format string, args ...any) { fmt.Printf("PROBE "+format+"\n", args...) }
	if err := opener.Open(context.Background(), &order, say); err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(opener.Root, "data"))
	if err != nil {
		fmt.Println("PROBE unreadable:", err)
		return nil
	}
	fmt.Println("PROBE read", digest.Of(data))
	return nil
}
