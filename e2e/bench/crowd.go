package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// crowdCommand makes this program a crowd: bench crowd ADDRESS SUBSCRIBERS. It prints a line when all have subscribed; then for each line
// on its standard input, a number of messages, it publishes so many to all and prints a line with the rate in deliveries/s.
const crowdCommand = "crowd"

const (
	crowdTopic = "plant/broadcast"
	// crowdDials is how many subscribers connect at the same time.
	crowdDials = 128
	// crowdPorts is how many of them come from one address: past half of an address's ports, Linux searches long for a free one.
	crowdPorts = 8000
	// crowdPatience bounds the time in which all subscribers connect, and one publishing.
	crowdPatience = 5 * time.Minute
)

// crowd is a process with all subscribers of one broker. It is one of its own because a process may not open as many files as
// two brokers have subscribers.
type crowd struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startCrowd returns when all have subscribed. The process ends with ctx.
func startCrowd(ctx context.Context, address string, subscribers int) (*crowd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &crowd{cmd: exec.CommandContext(ctx, self, crowdCommand, address, strconv.Itoa(subscribers))}
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.out = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	if _, err := c.out.ReadString('\n'); err != nil {
		return nil, errors.Join(fmt.Errorf("%d subscribers at %s: %w", subscribers, address, err), c.end())
	}
	return c, nil
}

// publish lets one of the crowd publish so many messages to all, and returns the rate in deliveries/s.
func (c *crowd) publish(messages int) (float64, error) {
	if _, err := fmt.Fprintln(c.in, messages); err != nil {
		return 0, fmt.Errorf("ask the crowd: %w", err)
	}
	var rate float64
	if _, err := fmt.Fscanln(c.out, &rate); err != nil {
		return 0, fmt.Errorf("the crowd's answer: %w", err)
	}
	return rate, nil
}

func (c *crowd) end() error { return errors.Join(c.in.Close(), c.cmd.Wait()) }

// runCrowd is the process itself. It ends with its standard input.
func runCrowd(address, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	subscribers := make([]*client, n)
	defer func() {
		for _, s := range subscribers {
			if s != nil {
				s.close()
			}
		}
	}()
	if err := subscribeAll(address, subscribers); err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		var messages int
		_, err := fmt.Scanln(&messages)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		rate, err := fanOutOnce(address, messages, subscribers)
		if err != nil {
			return err
		}
		fmt.Println(rate)
	}
}

func subscribeAll(address string, subscribers []*client) error {
	ctx, cancel := context.WithTimeout(context.Background(), crowdPatience)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(crowdDials)
	for i := range subscribers {
		g.Go(func() (err error) {
			from := &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i/crowdPorts))}
			if subscribers[i], err = dialMQTTFrom(ctx, from, address, fmt.Sprintf("panel-%d", i)); err != nil {
				return err
			}
			return subscribers[i].subscribe(crowdTopic)
		})
	}
	return g.Wait()
}

// fanOutOnce has one publisher send at QoS 0 to all subscribers.
func fanOutOnce(address string, messages int, subscribers []*client) (rate float64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), crowdPatience)
	defer cancel()
	pub, err := dialMQTT(ctx, address, "controller")
	if err != nil {
		return 0, err
	}
	defer pub.close()
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range subscribers {
		g.Go(func() error { return s.messages(ctx, messages) })
	}
	payload := make([]byte, messageBytes)
	begin := time.Now()
	for range messages {
		pub.send(crowdTopic, payload, 0)
	}
	if err := errors.Join(pub.w.Flush(), g.Wait()); err != nil {
		return 0, err
	}
	return float64(messages*len(subscribers)) / time.Since(begin).Seconds(), nil
}

// raiseFiles lets a process that does not do it itself, as Go programs do, open as many files as this one may.
func raiseFiles(pid int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit.Max, Max: limit.Max}, nil); err != nil {
		return fmt.Errorf("raise the limit of open files of process %d: %w", pid, err)
	}
	return nil
}
