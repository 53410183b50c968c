package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"foothold/internal/command"
	"foothold/internal/config"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/lab/ground"
	"foothold/protocol/digest"
	"foothold/tenant/hostclient"
	"foothold/tenant/orchestrator"
)

// insidePlace marks the process that asks from a place of the lab.
const insidePlace = "FOOTHOLD_BENCH_ASKS"

const (
	askPause   = time.Millisecond       // between two attempts
	askLimit   = 500 * time.Millisecond // of one attempt
	firstLimit = time.Minute            // for a first answer
	quoteLimit = 5 * time.Second        // of one quote: the TPM makes it
	hostPort   = 8443
	goneLimit  = 3 * time.Minute      // for what is to go
	lookPause  = 5 * time.Millisecond // between two listings of rules, each of which takes longer
	silence    = 3 * time.Second      // after the last answer it is the last: longer than a TCP segment is sent again
)

// asker is this program, running in a place of the lab. A line asks for something; a
// line with a time answers.
//
//	first URL     the first answer's time
//	last URL      the first answer's time and, when none has come for silence, the last one's
//	gone URL      the first answer's time and that of the first look that finds nothing
//
// A URL is a page, or tcp://address, which answers by accepting, or quote://file, the
// orchestrator's configuration, by which its host answers with a quote, or rules://address,
// which the place's kernel answers for while its rules name the address.
type asker struct {
	in    *os.File
	out   *bufio.Scanner
	ended chan error
}

func startAsker(ctx context.Context, l *labState, place string) (*asker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own program: %w", err)
	}
	in, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	read, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	c, err := control.Dial(l.state.Run())
	if err != nil {
		return nil, err
	}
	req := control.Request{Op: control.OpExec, Name: place, Args: []string{self}, Env: append(os.Environ(), insidePlace+"=yes"), Dir: l.work}
	if err := c.Send(req, in, out, os.Stderr); err != nil {
		return nil, err
	}
	a := &asker{in: write, out: bufio.NewScanner(read), ended: make(chan error, 1)}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	go func() {
		defer c.Close()
		defer stop()
		var reply control.Reply
		_, err := c.Receive(&reply)
		if err == nil && reply.Error != "" {
			err = errors.New(reply.Error)
		}
		a.ended <- err
	}()
	return a, nil
}

// close ends the process.
func (a *asker) close() error {
	a.in.Close()
	return <-a.ended
}

func (a *asker) ask(what, url string) error {
	_, err := fmt.Fprintln(a.in, what, url)
	return err
}

// answer waits for the next time.
func (a *asker) answer() (time.Time, error) {
	if !a.out.Scan() {
		return time.Time{}, fmt.Errorf("the process in the lab ended: %w", errors.Join(a.out.Err(), io.ErrUnexpectedEOF))
	}
	return time.Parse(time.RFC3339Nano, a.out.Text())
}

// askFromPlace is the other end: it runs in the lab until its standard input ends.
func askFromPlace(in io.Reader, out io.Writer) error {
	for lines := bufio.NewScanner(in); lines.Scan(); {
		what, url, _ := strings.Cut(lines.Text(), " ")
		attempt, err := attempts(url)
		if err != nil {
			return err
		}
		began := time.Now()
		for err := attempt(); err != nil; err = attempt() {
			if time.Since(began) > firstLimit {
				return fmt.Errorf("no answer of %s within %s: %w", url, firstLimit, err)
			}
			time.Sleep(askPause)
		}
		last := tell(out, time.Now())
		if what == "gone" {
			if err := awaitGone(attempt); err != nil {
				return fmt.Errorf("%s: %w", url, err)
			}
			tell(out, time.Now())
		}
		if what != "last" {
			continue
		}
		for time.Since(last) < silence {
			if attempt() == nil {
				last = time.Now()
			}
			time.Sleep(askPause)
		}
		tell(out, last)
	}
	return nil
}

// awaitGone returns when an attempt has found that there is nothing any more. Another
// failure is none of that.
func awaitGone(attempt func() error) error {
	for began := time.Now(); time.Since(began) < goneLimit; time.Sleep(lookPause) {
		if err := attempt(); errors.Is(err, errGone) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return fmt.Errorf("it is still there after %s", goneLimit)
}

func tell(out io.Writer, t time.Time) time.Time {
	fmt.Fprintln(out, t.Format(time.RFC3339Nano))
	return t
}

// attempts returns what asks once.
func attempts(url string) (func() error, error) {
	dialer := &net.Dialer{Timeout: askLimit}
	if address, ok := strings.CutPrefix(url, "tcp://"); ok {
		return func() error {
			c, err := dialer.Dial("tcp", address)
			if err != nil {
				return err
			}
			return c.Close()
		}, nil
	}
	if file, ok := strings.CutPrefix(url, "quote://"); ok {
		return quotes(file)
	}
	if address, ok := strings.CutPrefix(url, "rules://"); ok {
		return func() error { return named(address) }, nil
	}
	web := &http.Client{Timeout: askLimit, Transport: &http.Transport{DialContext: dialer.DialContext}}
	return func() error {
		res, err := web.Get(url)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		_, err = io.Copy(io.Discard, res.Body)
		return err
	}, nil
}

// errGone says that the kernel's rules do not name an address any more.
var errGone = errors.New("no rule names it")

// named is nil while the kernel's own listing of the firewall's table has the address.
func named(address string) error {
	cmd, err := command.New(context.Background(), "nft", "list", "table", "inet", "foothold")
	if err != nil {
		return err
	}
	rules, err := command.Wait(cmd)
	if err != nil {
		return err
	}
	return namedIn(string(rules), address)
}

func namedIn(rules, address string) error {
	words := strings.FieldsFunc(rules, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune(",/{}", r) })
	if slices.Contains(words, address) {
		return nil
	}
	return errGone
}

// quotes asks the lab's host as its orchestrator does.
func quotes(file string) (func() error, error) {
	var conf orchestrator.Config
	if err := config.Read(file, &conf); err != nil {
		return nil, err
	}
	cert, pool, err := conf.HostTLS.Load()
	if err != nil {
		return nil, err
	}
	host := hostclient.New(ground.HostName, netip.AddrPortFrom(lab.Address(lab.Host, lab.MgmtLAN), hostPort), cert, pool)
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), quoteLimit)
		defer cancel()
		_, err := host.Quote(ctx, digest.Of(nil))
		return err
	}, nil
}
