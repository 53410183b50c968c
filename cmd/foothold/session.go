package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"foothold/client"
	"foothold/client/term"

	"github.com/spf13/cobra"
)

// session is what a command of the API works with.
type session struct {
	*client.Client
	context client.Context
	out     *term.Out // data
	log     *term.Out // progress
}

// open finds the context of a command and prepares calls.
func open(cmd *cobra.Command) (*session, error) {
	c, err := findContext(cmd)
	if err != nil {
		return nil, err
	}
	api, err := client.Dial(c)
	if err != nil {
		return nil, usage("%w", err)
	}
	return &session{api, c, term.New(cmd.OutOrStdout()), term.New(cmd.ErrOrStderr())}, nil
}

// inSession is the RunE of a command that calls the orchestrator.
func inSession(run func(*cobra.Command, []string, *session) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		s, err := open(cmd)
		if err != nil {
			return err
		}
		return run(cmd, args, s)
	}
}

func findContext(cmd *cobra.Command) (client.Context, error) {
	c, err := client.Find(cmd.Flag("context").Value.String())
	if err != nil {
		return c, usage("%w", err)
	}
	return c, nil
}

// contextFlag is the --context of every command that talks to an orchestrator.
func contextFlag(c *cobra.Command) *cobra.Command {
	c.PersistentFlags().String("context", "", "context `FILE` (default: $"+client.Variable+", else the last lab's)")
	return c
}

// jsonFlag is the --json of every command that prints data.
func jsonFlag(c *cobra.Command) *cobra.Command {
	c.Flags().Bool("json", false, "print JSON")
	return c
}

func wantsJSON(cmd *cobra.Command) bool {
	on, err := cmd.Flags().GetBool("json")
	return err == nil && on
}

// printJSON prints one value, indented.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// orEmpty makes a missing list an empty one, so that scripts find a list.
func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// confirm asks on the terminal. Without one it refuses and names the flag.
func confirm(cmd *cobra.Command, question string) error {
	in := cmd.InOrStdin()
	if !term.IsTerminal(in) {
		return usage("%s: standard input is no terminal to ask on; say --yes", cmd.CommandPath())
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s [y/N] ", question)
	answer, err := readLine(in)
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errors.New("not confirmed, nothing was done")
	}
	return nil
}

// maxAnswer bounds what is read for a yes or no.
const maxAnswer = 64

// readLine reads up to a line's end without taking more from the terminal.
func readLine(r io.Reader) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for len(line) < maxAnswer {
		n, err := r.Read(b)
		if n == 1 {
			if b[0] == '\n' || b[0] == '\r' {
				break
			}
			line = append(line, b[0])
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
	}
	return string(line), nil
}

// when prints a time for people: the time of today, else with its date.
func when(t time.Time) string {
	switch {
	case t.IsZero():
		return ""
	case time.Since(t).Abs() < 12*time.Hour:
		return t.Local().Format("15:04:05")
	}
	return t.Local().Format("2006-01-02 15:04")
}

// ago prints how long a time is past.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := time.Since(t).Round(time.Second)
	switch {
	case d < 0:
		return "0s"
	case d < time.Hour:
		return d.String()
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// bytesText prints a size for people.
func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

// openRegular opens a file that a command line names.
func openRegular(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, usage("%w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, usage("%w", err)
	}
	return f, info.Size(), nil
}
