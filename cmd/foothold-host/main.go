// Command foothold-host is the provider's agent on a hypervisor. It is its own binary
// because it is measured: a change elsewhere must not change a host's registers.
//
//	foothold-host run     --config FILE
//	foothold-host enroll  --tpm PATH --name N --api ADDRESS:PORT --location L --asset A --software S --out FILE [--ek-chain FILE]
//	foothold-host quote   --tpm PATH --host FILE --nonce HEX --out FILE [--logs FILE]
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"foothold/internal/config"
	"foothold/internal/durable"
	"foothold/internal/harden"
	"foothold/internal/tpm"
	"foothold/protocol/inventory"
	"foothold/protocol/vmspec"
	"foothold/provider/enroll"
	"foothold/provider/host"

	"golang.org/x/sys/unix"
)

// errUsage is returned for a wrong command line; usage was printed.
var errUsage = errors.New("wrong command line")

func main() {
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	verbs := map[string]func(context.Context, []string) error{"run": run, "enroll": enrollHost, "quote": quoteHost}
	err := errUsage
	if len(os.Args) > 1 && verbs[os.Args[1]] != nil {
		err = verbs[os.Args[1]](ctx, os.Args[2:])
	} else {
		fmt.Fprintln(os.Stderr, "usage: foothold-host run|enroll|quote; -h after a verb shows its flags")
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "foothold-host:", err)
		os.Exit(1)
	}
}

// parse parses args and refuses what is left over.
func parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if f.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "%s takes no %q\n", f.Name(), f.Arg(0))
		return errUsage
	}
	return nil
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	file := f.String("config", "", "configuration file, as it was measured")
	if err := parse(f, args); err != nil {
		return err
	}
	if err := harden.Process(unix.CAP_NET_ADMIN); err != nil { // to make VMs' taps and count what is dropped of them
		return err
	}
	harden.LogCalls()
	var conf host.Config
	sum, err := config.ReadMeasured(*file, &conf)
	if err != nil {
		return err
	}
	return host.Run(ctx, conf, sum)
}

func enrollHost(_ context.Context, args []string) error {
	f := flag.NewFlagSet("enroll", flag.ContinueOnError)
	path := f.String("tpm", "/dev/tpm0", "TPM device, or socket of an emulator")
	var h inventory.Host
	f.StringVar(&h.Name, "name", "", "host's name, a DNS label: that of its server certificate")
	api := f.String("api", "", "management address, ADDRESS:PORT")
	f.StringVar(&h.Location, "location", "", "where it stands - site, row, rack - as tenants' policies name it")
	f.StringVar(&h.Asset, "asset", "", "asset tag, as it is on the machine")
	f.StringVar(&h.Software, "software", "", "platform release that is installed: the name of its reference values")
	out := f.String("out", "", "file for the inventory entry")
	var chain []string
	f.Func("ek-chain", "PEM file of certificates between the TPM's endorsement certificate and its manufacturer's root,\n"+
		"from the manufacturer; repeatable. Those that the TPM holds itself are added", func(file string) error {
		chain = append(chain, file)
		return nil
	})
	if err := parse(f, args); err != nil {
		return err
	}
	var err error
	if h.API, err = netip.ParseAddrPort(*api); err != nil || !vmspec.ValidName(h.Name) || *out == "" ||
		strings.TrimSpace(h.Location) == "" || strings.TrimSpace(h.Asset) == "" || strings.TrimSpace(h.Software) == "" {
		fmt.Fprintln(os.Stderr, "enroll: want --name, --api ADDRESS:PORT, --location, --asset, --software and --out, none of them empty; -h says what each is")
		return errUsage
	}
	if h.EKChain, err = enroll.ReadChain(chain); err != nil {
		return err
	}
	dev, err := tpm.Open(*path)
	if err != nil {
		return err
	}
	defer dev.Close()
	if h, err = enroll.Enroll(dev, h); err != nil {
		return err
	}
	return write(*out, h)
}

func write(file string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", file, err)
	}
	return durable.WriteFile(file, append(data, '\n'), 0o644)
}
