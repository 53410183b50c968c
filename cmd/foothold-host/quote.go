package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
	"foothold/provider/broker"
	"foothold/provider/enroll"
	"foothold/provider/measure"
)

// noVM stands for the time of a VM's command, which a quote of the host alone has none of.
const noVM = time.Second

// quoteHost quotes what the host runs, with the logs of its firmware and kernel: what a
// known-good host gives reference values by. It takes the TPM over, which must not serve
// an agent now.
func quoteHost(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("quote", flag.ContinueOnError)
	path := f.String("tpm", "/dev/tpm0", "TPM device")
	host := f.String("host", "", "file of the host's inventory entry, as 'enroll' wrote it")
	nonce := f.String("nonce", "", "qualifying data, 64 hexadecimal digits")
	out := f.String("out", "", "file for quote and logs")
	logs := f.String("logs", "", "file for the logs alone, as 'foothold platform manifest create --evidence' reads them")
	if err := parse(f, args); err != nil {
		return err
	}
	qualifying, err := digest.Parse(*nonce)
	if err != nil || *out == "" || *host == "" {
		fmt.Fprintln(os.Stderr, "quote: want --host, --nonce, 64 hexadecimal digits, and --out")
		return errUsage
	}
	entry, err := enroll.ReadEntry(*host)
	if err != nil {
		return err
	}
	keys, err := broker.KeysOf(entry)
	if err != nil {
		return err
	}
	dev, err := tpm.Open(*path)
	if err != nil {
		return err
	}
	defer dev.Close()
	b, err := broker.New(dev, keys, noVM)
	if err != nil {
		return err
	}
	var answer hostapi.QuoteResponse
	if answer.Quote, err = b.StaticQuote(ctx, "", qualifying); err != nil {
		return err
	}
	if answer.Platform, err = measure.Here().Read(); err != nil {
		return err
	}
	if *logs != "" {
		if err := write(*logs, answer.Platform); err != nil {
			return err
		}
	}
	return write(*out, answer)
}
